"""What a run learned, in pictures on one page: `python -m report RUN`."""
