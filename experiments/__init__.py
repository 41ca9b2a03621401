"""The paper's tables: a command a row, given groups, the tables, publishing of results."""
