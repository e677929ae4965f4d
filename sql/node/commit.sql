update pgonce_node.outputs set is_visible = true where not is_visible
