"""Whether this machine is in order for LMS, and what to do where it is not."""
