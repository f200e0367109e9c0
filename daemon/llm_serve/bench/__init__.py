"""The load test: sends requests as many clients would, times them, and watches what the server says of itself."""
