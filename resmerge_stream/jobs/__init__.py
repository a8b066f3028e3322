"""The tool as a Job on the Hub: what it is given, which machine it takes, what that costs."""
