"""Check, then time, attention on every backend and beside its peers; see --help for --json and --plot."""

from llmfast.testing.bench import main

if __name__ == "__main__":
    main("attention")
