"""`permafrost plan`: predict what a step holds, sends and costs, without the machines."""
