"""What a user asks for in; files and tables out. One module, or folder, per command."""
