"""Tables: their files, columns, ingest, statistics and cache."""
