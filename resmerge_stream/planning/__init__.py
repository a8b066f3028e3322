"""PLAN: everything is decided from headers, before anything big moves."""
