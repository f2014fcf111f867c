"""The command line: one thin file per verb, imported only when its verb runs. The only part of hasten that prints."""
