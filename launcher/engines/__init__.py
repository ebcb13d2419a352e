"""The two engines; `permafrost.launcher.engine.build_engine` picks one and imports only that one."""
