"""Jobs that outlive the tab, and plans; a process for each that runs."""
