"""What every floor may use: wording of errors, checks of arguments, optional packages, atomic files."""
