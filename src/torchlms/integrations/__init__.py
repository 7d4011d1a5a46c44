"""Integrations: a trainer's own loop under LMS. One thin file per library; none is loaded here."""
