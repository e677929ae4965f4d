delete from pgonce_node.outputs
