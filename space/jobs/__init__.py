"""Jobs that outlive the tab."""
