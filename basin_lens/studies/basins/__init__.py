"""Does a model have basins at any layer, scale or path length?"""
