"""The objectives, a file each: settings, loss, and what it counts. They import no torch."""
