"""The two engines; `permafrost.launcher.engines.base.build_engine` picks one and imports only that one."""
