// An Android library: Java that Kotlin takes as its own, over the C library built from this repository.
plugins { id("com.android.library") version "8.7.0" }

android {
    namespace = "io.halfbyte"
    compileSdk = 35
    defaultConfig {
        minSdk = 24
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") }
        externalNativeBuild { cmake { arguments += "-DHALFBYTE_STRICT=OFF" } }
    }
    externalNativeBuild { cmake { path = file("src/main/cpp/CMakeLists.txt") } }
    androidResources { noCompress += "hb" } // so that an asset can be mapped where it lies
}
