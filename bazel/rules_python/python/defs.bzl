"""Names that Bazel 4 to 6 load from rules_python where there is no network, from the rules that they have built in."""

py_binary = native.py_binary
py_library = native.py_library
py_runtime = native.py_runtime
py_test = native.py_test
