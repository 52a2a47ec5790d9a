"""One module a stage: its options, what its result depends on, how it is made."""
