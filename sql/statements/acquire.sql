select partition, epoch from pgonce.acquire($1, $2, $3, $4)
