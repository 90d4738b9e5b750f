"""`python cli.py …` is `prunesearch …`, for a checkout that is not installed."""

from prunesearch.cli.app import main

if __name__ == "__main__":
    main()
