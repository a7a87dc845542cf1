"""One module per command of `cbam`: HELP, a line; `add(parser)`, its options; `run(options)`, its exit code.

The help of `cbam` reads them all, so none imports torch, nor anything that takes time, outside of `run`.
"""
