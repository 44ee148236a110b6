"""What is applied to a model before it is sharded: one file per transform, one apply function each."""
