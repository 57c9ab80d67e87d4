"""Reading files that somebody else wrote: JSON Lines, JSON lists and Parquet, with every check in one place.

`open_rows` opens a file of rows by its first bytes; `read_records` yields its objects; `read_object` reads a file that
is one JSON object. Only regular files are opened: a pipe would hang or could not be read twice. Every fault is one
RequestError with file, row and reason; a file cannot take much more memory than its size.
"""
