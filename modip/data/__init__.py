"""Data sets: the Parquet episode schema and one small file per source."""
