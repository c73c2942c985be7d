// Worst moments: the tokens where the exits cost most.
