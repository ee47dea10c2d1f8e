"""What methods learn from images before a merge: statistics, coefficients, masks, routers, corrections."""
