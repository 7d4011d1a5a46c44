"""The thinking: records and arithmetic, no torch and no devices."""
