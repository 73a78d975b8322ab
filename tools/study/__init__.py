"""The pre-registered study of the quickstart's student; see protocol.md."""
