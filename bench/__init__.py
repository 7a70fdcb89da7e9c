"""The benchmark harness: scenarios that start the real server, load it, and check what it did."""
