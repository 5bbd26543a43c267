"""The demonstration job: distil a small GPT on the standard library's own source code."""
