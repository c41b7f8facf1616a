"""Single towers of others, recognised by their names, mapped and loaded: text towers and image towers.

They have no method of this package and no partner tower. A run starts from them, or retrieval keeps them frozen.
"""
