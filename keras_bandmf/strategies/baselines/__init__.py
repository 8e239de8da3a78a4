"""Strategies without bands, for comparison: trees and buffered matrices."""
