delete from pgonce_node.outputs where not is_visible
