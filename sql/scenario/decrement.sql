update pgonce.inventory set stock = stock - 1 where item = $1 returning stock
