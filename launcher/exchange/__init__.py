"""Exchange weights and heads with other programs' formats."""
