"""Borrowed: forward and backward cases that other projects test themselves with, run under LMS."""
