"""`permafrost plan`: what a step will hold, send and cost, found out without the machines."""
