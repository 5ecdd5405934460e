// Runs before the first paint, so that a chosen theme never flashes.
try {
  const theme = localStorage.getItem("halfbyte.theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch { /* storage is off: follow the system */ }
