"""Tables and charts out of plain numbers."""
