insert into pgonce.inventory (item, stock) values ($1, $2)
