"""Independent oracles: plain implementations that share no code with the library and are themselves tested."""
