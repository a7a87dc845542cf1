"""One module per command of `cbam`: HELP, `add(parser)` for its options, `run(options)`, its exit code.

`cbam --help` imports them all, so none imports torch or anything else slow outside `run`.
"""
