"""Names that Bazel 4 to 6 load from rules_java where there is no network, from the rules that they have built in."""

java_binary = native.java_binary
java_import = native.java_import
java_library = native.java_library
java_proto_library = native.java_proto_library
java_runtime = native.java_runtime
java_toolchain = native.java_toolchain
