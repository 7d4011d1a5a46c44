"""Sweep: which ops give the same bits when they run again. A tool; nothing else imports it."""
