select word, count from pgonce.word_counts where consumer = $1
