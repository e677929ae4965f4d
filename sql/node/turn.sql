select t.turn from pgonce_node.turns t where t.process = $1
