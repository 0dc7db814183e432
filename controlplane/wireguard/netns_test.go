package wireguard

const guestEnv = "WIREGUARD_TEST_GUEST"

func runGuest() {}
