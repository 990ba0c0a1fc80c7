"""The demo: projected digits merged by several methods through the real command, with a table and a report."""
