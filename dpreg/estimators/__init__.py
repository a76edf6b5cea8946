"""The estimators of `dpreg.sklearn`, all but the targets."""
