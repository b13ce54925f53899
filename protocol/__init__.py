"""What the processes of drumline say to each other, and the arithmetic they share. Imports nothing else of ours."""
